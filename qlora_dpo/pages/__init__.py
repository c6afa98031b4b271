"""The one way in which a page is served, whichever command shows it: to whom, which routes, and how much of each."""
