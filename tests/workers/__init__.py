"""What the processes of `test_processes.py` do."""
