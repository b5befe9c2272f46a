"""`vzip firstcontact`: what a machine with a GPU makes of vzip, in one file that can be sent."""
