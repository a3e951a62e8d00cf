"""What the runs say: comparison, figures and report, all from tables of finished runs; cost; predictions; a
look at the members.

Nothing here trains.
"""
