"""Load → analyse → prune → heal → evaluate → save → report, and the options of all of it."""
