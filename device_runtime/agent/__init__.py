"""An agent that takes part in a federation by itself: it joins, waits for rounds, trains and sends."""
