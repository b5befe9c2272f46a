"""What this machine is, what it has, and time measured on it; nothing here knows of a backend."""
