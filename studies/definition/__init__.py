"""What a study is: its configuration, read from TOML, checked in one go, and laid out as points."""
