"""Many trainings in one table. The words of its command line that grids know, too."""

NO_HEADS = "none"
ON, OFF = "on", "off"
