"""scripts/testhost: real Debian systems on this machine, each with its own init, sshd, journal and address.

Standard library only, and the programs that `programs` names. `operations` is what others call; it reads from top to
bottom like the life of a host. `keeper` is the process that stays with each host."""
