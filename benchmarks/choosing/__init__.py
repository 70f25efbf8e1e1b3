"""What losses and samplers do, shown on an example: the tables and figures of docs/choosing.md."""
