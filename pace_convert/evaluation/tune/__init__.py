"""`pace tune`: choose the memory's parameters by data of yours."""
