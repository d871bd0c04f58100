"""What parity.py runs and test_parity.py looks at."""

SETTINGS = [(stage, precision, "none") for precision in ("fp32", "bf16") for stage in (0, 1, 2, 3)]
SETTINGS += [(2, "fp32", "cpu"), (3, "fp32", "cpu")]

# run -> (what it goes on from, at which step, its ZeRO stage, offload), by number of ranks and in this order.
# `moved` is the uninterrupted run, and all of them end at its last step, 150.
MOVES = {
    "first": {
        "stage_3_2": ("moved", 50, 2, "none"),
        "stage_3_2_3": ("stage_3_2", 100, 3, "none"),
        "stage_3_1": ("moved", 50, 1, "none"),
        "stage_3_1_3": ("stage_3_1", 100, 3, "none"),
        "offload_off_on": ("moved", 50, 3, "cpu"),
        "offload_off_on_off": ("offload_off_on", 100, 3, "none"),
    },
    "second": {
        "ranks_2_1": ("moved", 50, 3, "none"),
        "all_at_once": ("moved", 50, 0, "none"),
    },
    "third": {
        "ranks_2_1_2": ("ranks_2_1", 100, 3, "none"),
        "all_at_once_and_back": ("all_at_once", 100, 2, "cpu"),
    },
}
