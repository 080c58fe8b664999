"""Two hosts on one machine, and a migration between them to look at."""
