"""The demo model: the scenes it sees, how it is trained and how often it is right."""
