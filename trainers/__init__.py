"""The trainers: the shared loop, and a file per method."""
