"""The process, the machine and the disk: what every level above stands on and what knows none of them."""
