"""Kedro datasets of this project: where its files meet the catalog."""
