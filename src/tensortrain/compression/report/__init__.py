"""What was gained: the report, and the measurements that it holds."""
