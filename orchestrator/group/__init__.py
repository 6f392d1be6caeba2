"""The group: the cluster's slots, the processes on them, and the members of one generation."""
