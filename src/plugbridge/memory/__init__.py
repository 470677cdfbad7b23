"""What training steps take: predicted from shapes alone, and measured where they fit."""
