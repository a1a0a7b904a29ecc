"""Many networks stepped together, and the streams of rows that they share."""
