"""Package path of the wire; see the parent."""
