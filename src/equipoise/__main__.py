from equipoise.cli import main

raise SystemExit(main())
