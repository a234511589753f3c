from equipoise.cli.main import main

raise SystemExit(main())
