"""The reward zoo: one contract, and a file per reward."""
