"""Choosing the experts of every token and the order of the rows they make, without a sort and without the host."""
