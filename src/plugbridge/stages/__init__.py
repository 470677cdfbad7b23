"""The stages of a run, one function each. Only here do shrink, transfer and train meet."""
