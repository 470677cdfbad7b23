"""What a run would take, from the models' configuration files alone: nothing is loaded, nothing is run."""
