"""Pictures and clips, from a file to what the tower takes, and what was kept of them drawn."""
