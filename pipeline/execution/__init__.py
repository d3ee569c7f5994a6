"""One arm: train it in a sandbox, keep its adapter, judge it with the pristine image, publish one result file."""
