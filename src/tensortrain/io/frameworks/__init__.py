"""Where users of other libraries live: each module needs that library, and is imported when it is asked for."""
