"""Runs the stages of a pipeline: requests, schedules, channels."""
