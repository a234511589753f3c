"""Everything that is here for the sake of the BCL authors' files and flags."""
