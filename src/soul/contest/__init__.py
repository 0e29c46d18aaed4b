"""The contest: task x objective x optimizer, the same trials for every cell, judged by the unlearning frontier."""
