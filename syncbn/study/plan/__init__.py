"""What a study is: its file, its arms, its grid of runs."""
