"""The studies that come with the package, each a commented TOML file."""
