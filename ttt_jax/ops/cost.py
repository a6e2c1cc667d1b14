def this_device(): return None
def choose_collective(*a): return "all_to_all"
def ring_slices(*a): return 3
def choose_implementation(**k): return "sequential"
