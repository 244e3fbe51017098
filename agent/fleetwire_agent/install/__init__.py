"""Puts the agent on a host as a service, out of its own bundle, and takes it off again.

Standard library only, and neither psutil nor websockets: it must be able to say why those cannot be loaded here."""
