"""PEFT methods: those that peft has, and our own registered beside them."""
