"""The command line `vzip`, and the commands that run a bundle."""
