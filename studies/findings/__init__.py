"""Numbers that figures and report state, as pure functions of the frames."""
