"""Running a study: engines that compute points, and the loop that stores them."""
