"""The life of a campaign: freeze it (`init`), then freeze, launch, control and close its rounds, and end it."""
