"""`vzip report`: one HTML page about a bundle."""
