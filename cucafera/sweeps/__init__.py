"""Many runs: the jobs of a sweep, what came out of them, and the answer."""
