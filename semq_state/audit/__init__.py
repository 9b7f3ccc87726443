"""Audit: functions from snapshots and files to a report."""
