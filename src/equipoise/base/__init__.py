"""The ground floor: errors, files, ranks, devices."""
