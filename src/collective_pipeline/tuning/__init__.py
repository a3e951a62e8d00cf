"""Studies of many trainings, shared by any number of workers."""
