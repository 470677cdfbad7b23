"""Tasks: rows of text with options, one of them right."""
