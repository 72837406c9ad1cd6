"""Has the training data seen the evaluation? Pictures by hash, texts by n-gram; ``audit`` is the door."""
