"""What the runs say: comparison, figures and report.

Everything here starts from tables of finished runs; nothing trains or loads a model.
"""
