"""Several replicas and several processes."""
