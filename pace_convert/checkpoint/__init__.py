"""Any model folder or Hub repository, as data."""
