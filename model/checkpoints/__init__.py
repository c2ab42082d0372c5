"""Published checkpoint formats: key rules that run both ways, safe readers and writers."""
